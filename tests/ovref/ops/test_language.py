"""Captions in other languages are noticed, and English ones let through."""

from pathlib import Path

import pytest

from ovref.corpora import CorpusSpec, read_captions
from ovref.ops.language import is_other_language
from ovref.records import Caption
from scene_captions import sample_captions

COCO = Path(__file__).parents[4] / "shared" / "data" / "coco" / "captions_val2017.json"
OTHERS = {
    "German": [
        "ein Mann mit einem Hund neben einer Bank",
        "Zwei Katzen liegen auf dem Sofa.",
        "ein rotes Auto",
        "Eine Frau steht vor dem Spiegel im Bad",
        "Ein Zug f\u00e4hrt durch die Berge",
        "Kinder spielen Fu\u00dfball auf der Wiese",
        "ein Teller mit Nudeln und Gem\u00fcse",
        "der Bahnhof bei Nacht",
    ],
    "French": [
        "un homme avec un chien sur un banc",
        "Deux chats sont allong\u00e9s sur le canap\u00e9.",
        "une voiture rouge",
        "Une femme se tient devant le miroir de la salle de bain",
        "Un train traverse les montagnes",
        "des enfants jouent au football dans l'herbe",
        "une assiette de p\u00e2tes et de l\u00e9gumes",
        "la tour Eiffel \u00e0 Paris la nuit",
    ],
    "Spanish": [
        "un hombre con un perro en un banco",
        "Dos gatos est\u00e1n acostados en el sof\u00e1.",
        "una mujer con sombrero",
        "Una mujer frente al espejo del ba\u00f1o",
        "Un tren pasa por las monta\u00f1as",
        "los ni\u00f1os juegan al f\u00fatbol en el parque",
        "un plato de pasta con verduras",
        "el coche rojo de mi padre",
    ],
    "Italian": [
        "un uomo con un cane su una panchina",
        "Due gatti sono sdraiati sul divano.",
        "una macchina rossa",
        "Una donna davanti allo specchio del bagno",
        "Un treno attraversa le montagne",
        "dei bambini giocano a calcio nel prato",
        "un piatto di pasta con verdure",
        "il gatto dorme sul tavolo della cucina",
    ],
    "Chinese": [
        "\u4e00\u53ea\u732b\u5750\u5728\u6c99\u53d1\u4e0a",
        "\u7ea2\u8272\u7684\u6c7d\u8f66",
    ],
    "Russian": [
        "\u0447\u0435\u043b\u043e\u0432\u0435\u043a \u0438 \u0441\u043e\u0431\u0430\u043a\u0430",
        "\u041a\u0440\u0430\u0441\u043d\u0430\u044f \u043c\u0430\u0448\u0438\u043d\u0430",
    ],
}  # fmt: skip


@pytest.mark.parametrize("language", OTHERS)
def test_other_languages_are_noticed(language):
    missed = [caption for caption in OTHERS[language] if not is_other_language(caption)]
    assert missed == []


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "12 34",
        "a dog",
        "red car",
        "pixel art corgi pizza",
        "the Arc de Triomphe in Paris",
        "Los Angeles skyline",
        "a man in La Paz, El Alto",
        "Rio de Janeiro",
        "Vincent van Gogh",
        "a cafe with a sign that says la vie en rose",
        "people flying kites \u2013 caf\u00e9 \u6f22\u5b57 \U0001f600",
        "a pi\u00f1ata and a cr\u00e8me br\u00fbl\u00e9e",
        "spaghetti con carne",
        "a fountain in Las Vegas near El Dorado",
    ],
)
def test_english_is_let_through(caption):
    assert not is_other_language(caption)


def test_the_miniature_is_english():
    assert not any(is_other_language(text) for text, _ in sample_captions(500, seed=0))


def test_hardly_any_caption_of_coco_is_taken_for_another_language():
    if not COCO.exists():
        pytest.skip(f"no COCO captions at {COCO}")
    captions = [
        record.text
        for record in read_captions(CorpusSpec(path=str(COCO)))
        if isinstance(record, Caption)
    ]
    wrong = [caption for caption in captions if is_other_language(caption)]
    assert len(wrong) < 0.001 * len(captions), wrong
    assert len(wrong) < 10, wrong
