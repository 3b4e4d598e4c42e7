"""The operations: one signature each (:mod:`.schema`), four backends (:mod:`.dispatch`)."""
