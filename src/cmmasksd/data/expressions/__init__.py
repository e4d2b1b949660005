"""True sentences from instance segmentation: class names and masks in, referring expressions out.

instances.py    COCO's instances.json, read
words.py        class names as nouns
shapes.py       position, size and contact of masks
colours.py      colours of objects
relations.py    relations of two objects
meaning.py      predicates, and the objects they hold for, strictly and loosely
claims.py       what is strictly true of one object
language.py     wording
generate.py     describe: the sentences of an image
dataset.py      the sentences of whole files, as a data set
writing.py      these, written as a REFER release or a manifest
"""

from cmmasksd.data.expressions.generate import Description as Description
from cmmasksd.data.expressions.generate import describe as describe
from cmmasksd.data.expressions.instances import Instance as Instance
from cmmasksd.data.expressions.instances import InstanceFile as InstanceFile
from cmmasksd.data.expressions.words import Vocabulary as Vocabulary
