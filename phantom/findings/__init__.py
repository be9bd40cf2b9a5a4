"""What heads show beside a plain bleed, for phantoms that ask for it (``synthesize --findings``).

In comes a head, out comes the same head with findings. ``choose`` draws which ones; ``outside``
draws those of scalp and skull, ``mouth`` jaw, tongue and neck, ``inside`` those within the dura,
``subdurals`` bleeds that lie in another way. None takes a draw from the stream that makes the
head: without findings every phantom stays as it was, byte for byte.
"""
