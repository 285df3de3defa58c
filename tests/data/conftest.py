from types import ModuleType

import pytest


@pytest.fixture
def tokenizer(tiny_models: ModuleType):
    return tiny_models.character_tokenizer()
