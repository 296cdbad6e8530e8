"""Random cases against a truth that shares no algebra with the code: see command.py."""
