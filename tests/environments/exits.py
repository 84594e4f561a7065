"""A file that cannot be imported: it ends its process."""

import os

os._exit(3)
