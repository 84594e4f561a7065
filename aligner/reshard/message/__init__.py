"""One message of a transfer: its layout, packing and casting, checksums, deltas, and the kernels that do it."""
