"""The model cut along its cells: selection, assembly, and the sparse model itself."""
