"""What transformers models look like: heads, shapes, names, packing, sampling."""
