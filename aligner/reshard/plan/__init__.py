"""Who sends which region to whom, in which message and order: pure functions of both layouts, the same on every rank."""
