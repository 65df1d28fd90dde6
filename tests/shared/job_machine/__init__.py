"""A Hypothesis state machine: random events, compared with a model after every step.

Workers, producers and users act in any order, over lost, duplicated and reordered messages.
A model in plain Python predicts each call. Time does not pass by itself: a rule moves leases
and delays into the past in the tables.
"""
