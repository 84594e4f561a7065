"""Rows of files, by number.

In: data.path (files of any kind, folders, globs, lists of them), data.columns and data.format. Out: a `RowSource`.
"""
