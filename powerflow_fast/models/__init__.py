"""What the package knows of a language model as such: head, parameters, sizes, names, sampling."""
