"""How well a collection covers a list of classes."""

from dataclasses import dataclass

from ovref_inference.collection.reference_collection import ReferenceCollection


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a collection has for one class name."""

    name: str
    references: int
    """References of the noun itself, without deleted ones; 0 if it is not in the vocabulary."""
    needed: int
    """References from which a noun stands alone."""
    neighbours: tuple[str, ...]
    """Nouns that were taken in for its stored prototypes. Of a name that is not in the vocabulary
    they are found when it is asked for, and none are listed here."""

    @property
    def enough(self) -> bool:
        return self.references >= self.needed


def coverage(collection: ReferenceCollection, names: list[str]) -> list[Coverage]:
    """For every class name, in order, whether the collection has enough references for it.

    Names are compared in lower case and without outer blanks, as `prototypes` does.
    """
    needed = collection.prototype_config.needed
    found = []
    for name in names:
        noun = name.strip().lower()
        references = len(collection.references_of(noun))
        # Only a rare noun of the vocabulary has stored prototypes made of other nouns.
        used = collection.prototypes([noun]).nouns[0] if 0 < references < needed else ()
        found.append(
            Coverage(
                name=name,
                references=references,
                needed=needed,
                neighbours=tuple(other for other in used if other != noun),
            )
        )
    return found
