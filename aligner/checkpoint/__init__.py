"""What a job needs to go on where it was: written beside training, whole or not there at all, read under any layout.

In: tensors as regions, and plain values, from roles, loop and driver. Out: a folder for a step; and all of it back.
"""
