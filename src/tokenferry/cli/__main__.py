"""`python -m tokenferry.cli`, for torchrun."""

from tokenferry_command import run

if __name__ == "__main__":
    run()
