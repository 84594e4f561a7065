"""A tool that searches documents, for questions that they answer: `documents` is a JSON Lines file with "title" and "text"."""

import json
import math
import re
from collections import Counter
from pathlib import Path


class Search:
    """Ranks documents by TF-IDF, in plain Python: good for some thousands; a real index goes behind the same method."""

    def __init__(self, documents: str, results: int = 2, characters: int = 400) -> None:
        rows = [json.loads(line) for line in Path(documents).read_text(encoding="utf-8").splitlines()]
        self.texts = [f"{row['title']}\n{row['text']}" for row in rows]
        self.words = [Counter(words_of(text)) for text in self.texts]
        self.rarity = Counter(word for words in self.words for word in words)
        self.results, self.characters = results, characters

    def search(self, query: str) -> str:
        """Search the documents.

        Args:
            query: The words to look for.
        """
        scores = [(self._score(words, words_of(query)), -place) for place, words in enumerate(self.words)]
        best = [-place for score, place in sorted(scores, reverse=True)[: self.results] if score > 0]
        return "\n\n".join(self.texts[place][: self.characters] for place in best) or "Nothing was found."

    def _score(self, words: Counter, query: list) -> float:
        weights = (words[word] * math.log(1 + len(self.texts) / self.rarity[word]) for word in query if word in words)
        return sum(weights) / math.sqrt(1 + sum(words.values()))


def words_of(text: str) -> list:
    return re.findall(r"\w+", text.lower())
