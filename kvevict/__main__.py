"""`python -m kvevict` and the command `kvevict`."""

import sys


def main() -> None:
    try:
        from kvevict.cli import app
    except ModuleNotFoundError as missing:
        print(f"kvevict's command line needs {missing.name}: pip install 'kvevict[hf]'", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
