"""Jobs driven at random by several workers over lost, doubled and reordered messages.

A model in plain Python says what each call does. Time passes where the machine says so: a
lease or a wait is moved into the past in the table.
"""
