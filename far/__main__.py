"""``python -m far`` runs the command ``far``."""

from far.cli.main import program

if __name__ == "__main__":
    program()
