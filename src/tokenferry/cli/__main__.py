"""`python -m tokenferry.cli`, for torchrun."""

from tokenferry.cli.main import run

if __name__ == "__main__":
    run()
