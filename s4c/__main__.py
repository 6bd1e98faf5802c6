"""`python -m s4c` is the command `s4c`."""

from s4c.cli.main import app

if __name__ == "__main__":
    app(prog_name="s4c")
