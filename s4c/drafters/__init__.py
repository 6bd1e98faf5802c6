"""The methods. A new one is a file of this folder and a line of this table."""

from s4c.drafters import ngram, s4c, sdsat
from s4c.drafters.base import Method

METHODS: dict[str, Method] = {method.name: method for method in (s4c.METHOD, sdsat.METHOD, ngram.METHOD)}
