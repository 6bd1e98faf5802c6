"""The methods. A new one is a file of this folder and a line of this table."""

from s4c.drafters import draft_model, medusa, ngram, s4c
from s4c.drafters.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (s4c.METHOD, medusa.METHOD, ngram.METHOD, draft_model.METHOD)
}
