"""Faults injected into real servers and real workers while they run a few hundred jobs."""
