"""The command line: ``main`` parses, and what a command does lies in the folder that it belongs to."""
