"""For verl's settings that name a module to import; importing it calls `verl.register`."""

from powerflow_fast.integrations.verl import register

register()
