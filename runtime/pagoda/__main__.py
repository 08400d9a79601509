"""`python -m pagoda`, where the command is not on the path."""

from pagoda.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
