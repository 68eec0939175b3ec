"""What every test shares: hypothesis without wall-clock deadlines, which a busy machine breaks."""

from hypothesis import settings

settings.register_profile("muxrt", deadline=None, print_blob=True)
settings.load_profile("muxrt")
