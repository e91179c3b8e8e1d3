"""``python -m tinyonn`` is ``tinyonn``."""

from tinyonn.cli import main

main()
