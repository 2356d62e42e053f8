"""Operations whose import path says Triton for historical reasons; nothing here needs Triton."""
