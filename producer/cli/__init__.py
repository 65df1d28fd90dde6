"""The commands: parse, construct, call, print."""
