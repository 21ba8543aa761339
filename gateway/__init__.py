"""The data plane: decides, in one Redis round trip, whether a call may consume."""
