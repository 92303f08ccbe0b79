"""A WordPiece vocabulary, trained deterministically.

The trainer of the `tokenizers` library breaks ties by hash order: two runs give two vocabularies (measured). Here ties
go by count, then by spelling. Tokenising itself is the library's.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000


def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A lower-casing BERT tokenizer whose vocabulary merges the most frequent pairs of pieces first.

    Args:
        texts: of the train split.
        vocab_size: upper bound; special tokens are ids 0 to 4.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = [*SPECIAL, *_pieces(words, vocab_size - len(SPECIAL))]
    model = models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()  # people read pieces joined
    return tokenizer


def _pieces(words: Counter[str], size: int) -> list[str]:
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    alphabet = {letter for letter, _ in sorted(letters.items(), key=lambda x: (-x[1], x[0]))[:MAX_ALPHABET]}
    spelled = {
        word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in sorted(words) if set(word) <= alphabet
    }
    pieces = sorted({piece for spelling in spelled.values() for piece in spelling})[:size]
    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, spelling in spelled.items():
        for pair in itertools.pairwise(spelling):
            pairs[pair] += words[word]
            where[pair].add(word)
    while len(pieces) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merged = best[0] + best[1].removeprefix("##")
        if merged not in pieces:
            pieces.append(merged)
        for word in where.pop(best):
            _merge(word, words[word], best, merged, spelled, pairs, where)
        del pairs[best]
    return pieces


def _merge(
    word: str,
    count: int,
    best: tuple[str, str],
    merged: str,
    spelled: dict[str, list[str]],
    pairs: Counter[tuple[str, str]],
    where: defaultdict[tuple[str, str], set[str]],
) -> None:
    """Spell one word with the merged piece and correct the pair counts."""
    old = spelled[word]
    new: list[str] = []
    for piece in old:
        if new and (new[-1], piece) == best:
            new[-1] = merged
        else:
            new.append(piece)
    for pair in itertools.pairwise(old):
        pairs[pair] -= count
        if pairs[pair] <= 0:
            del pairs[pair]
        if pair != best:
            where[pair].discard(word)
    for pair in itertools.pairwise(new):
        pairs[pair] += count
        where[pair].add(word)
    spelled[word] = new
