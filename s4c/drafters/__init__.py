"""The methods. A new one is a file of this folder and a line of this table."""

from s4c.drafters import draft_model, medusa, ngram, s4c, sdsat, sdsat_full
from s4c.drafters.base import Method

METHODS: dict[str, Method] = {line.METHOD.name: line.METHOD for line in (s4c, medusa, sdsat, ngram, draft_model)}

FULL: dict[str, Method] = {line.METHOD.name: line.METHOD for line in (sdsat_full,)}
"""Those that can be trained together with a copy of the whole target (`s4c train --full`), and how."""
