"""`make gpu-pack`: one folder with what a bare GPU machine without a network lacks."""
