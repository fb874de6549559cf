from hypothesis import HealthCheck, settings

from shared.cpu import share_cores

share_cores()
# A busy machine is no failure; pytest's own timeout bounds a test.
settings.register_profile("captune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("captune")
