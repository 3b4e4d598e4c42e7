"""The operations gae, append and gather: one signature each (:mod:`.schema`), four backends (:mod:`.dispatch`)."""
