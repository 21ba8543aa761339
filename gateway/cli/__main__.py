"""`python -m gateway.cli`: the `entitlement` command."""

from gateway.cli import main

if __name__ == "__main__":
    main(prog_name="entitlement")
