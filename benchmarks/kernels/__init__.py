"""Tools for those who work on the kernels; none needs a GPU."""
