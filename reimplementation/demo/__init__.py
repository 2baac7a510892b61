"""What the command `demo` shows: each op reads the colours of images."""
