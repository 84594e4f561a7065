"""What runs inside sandboxes, with nothing but the standard library: the tests in one, the program they test in another.

In: a suite and a program. Out: which tests passed. What the program hands over are values, so no verdict is its own.
"""
