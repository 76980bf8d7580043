"""``python -m clipdeploy``."""

from clipdeploy.cli.main import main

main(prog_name="clipdeploy")
