"""Fault injection: real servers and real workers fail while they run a few hundred jobs."""
