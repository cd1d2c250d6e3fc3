"""``python -m sprue.cli`` is ``sprue``."""

from sprue.cli import main

if __name__ == "__main__":
    main()
