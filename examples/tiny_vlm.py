"""The tiny LLaVA, its processor and its records about coloured squares, as the other examples import them."""

from seecal.recipes import tiny

CHAT_TEMPLATE = tiny.CHAT_TEMPLATE
IMAGE_SIZE, PATCH, IMAGE_TOKENS = tiny.IMAGE_SIZE, tiny.PATCH, tiny.IMAGE_TOKENS
tiny_tokenizer, tiny_llava_processor, tiny_llava = tiny.tiny_tokenizer, tiny.tiny_llava_processor, tiny.tiny_llava
tiny_image, tiny_records, tiny_dataset = tiny.tiny_image, tiny.tiny_records, tiny.tiny_dataset
