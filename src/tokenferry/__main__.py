"""`python -m tokenferry` is the command `tokenferry`."""

from tokenferry_command import run

if __name__ == "__main__":
    run()
