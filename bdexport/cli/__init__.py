"""The command line: one thin file per command, registered in :mod:`bdexport.cli.main`."""
