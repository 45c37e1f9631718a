"""The meaning of a client's text: the words to speak, the pauses, and the place of each character in the input.

Pure functions: no I/O, no model and no audio. Outsiders import the names below, never a module of the package.
"""

from server.text.growing import GrowingText as GrowingText
from server.text.preparation import InputFormat as InputFormat
from server.text.preparation import PreparedSegment as PreparedSegment
from server.text.preparation import prepare as prepare
from server.text.pronunciations import EVERY_LANGUAGE as EVERY_LANGUAGE
from server.text.pronunciations import Pronunciations as Pronunciations
from server.text.pronunciations import PronunciationsError as PronunciationsError
from server.text.pronunciations import Respelling as Respelling
from server.text.pronunciations import Word as Word
from server.text.pronunciations import check_pronunciations as check_pronunciations
from server.text.pronunciations import load_pronunciations as load_pronunciations
from server.text.pronunciations import reload_pronunciations as reload_pronunciations
from server.text.sentences import Granularity as Granularity
from server.text.sentences import SentenceSplitter as SentenceSplitter
from server.text.sentences import end_of_last_sentence as end_of_last_sentence
from server.text.spans import Pause as Pause
from server.text.ssml import is_ssml as is_ssml
from server.text.ssml import may_become_ssml as may_become_ssml
