"""Generated scenes with true referring expressions: a data set without a download.

A scene is a textured, noisy background with 3 to 10 overlapping objects (8 shapes × 8 colours × 3 sizes × 3 fills).
Objects share attributes, so that every word of an expression matters. Three styles follow the three benchmarks:
``scenes`` (short, with location words, like RefCOCO), ``scenes+`` (no location words, like RefCOCO+) and ``scenesg``
(long, with relations to other objects, like G-Ref).

``HELD_OUT`` lists eight colour-shape pairs. No object of train, val or testA has one; every target of testB has one.
"""

from cmmasksd.data.scenes.captions import Phrase as Phrase
from cmmasksd.data.scenes.captions import caption as caption
from cmmasksd.data.scenes.captions import describe as describe
from cmmasksd.data.scenes.captions import facts as facts
from cmmasksd.data.scenes.captions import referring as referring
from cmmasksd.data.scenes.captions import twin as twin
from cmmasksd.data.scenes.dataset import SceneDataset as SceneDataset
from cmmasksd.data.scenes.dataset import make_scene as make_scene
from cmmasksd.data.scenes.drawing import render as render
from cmmasksd.data.scenes.vocabulary import COLOURS as COLOURS
from cmmasksd.data.scenes.vocabulary import HELD_OUT as HELD_OUT
from cmmasksd.data.scenes.vocabulary import SHAPES as SHAPES
from cmmasksd.data.scenes.vocabulary import SPLITS as SPLITS
from cmmasksd.data.scenes.vocabulary import STYLES as STYLES
from cmmasksd.data.scenes.vocabulary import Scene as Scene
from cmmasksd.data.scenes.vocabulary import names_held_out as names_held_out
