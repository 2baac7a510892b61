"""What setup.py needs to compile the extension; no part of the installed package."""
