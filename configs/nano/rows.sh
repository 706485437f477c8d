#!/bin/sh
# Makes the rows of the small model's last stages: drawn scenes, collages of shapes with animals or
# food, and pages of one or two lines in English and Chinese, all of 112 pixels.
#
#   configs/nano/rows.sh train       into runs/nano/rows/train
#   configs/nano/rows.sh cells       into runs/nano/rows/cells: what lies in each cell of a collage
#   configs/nano/rows.sh named       into runs/nano/rows/named: collages that must be named, most with boxes
#   configs/nano/rows.sh more        into runs/nano/rows/more: new ones of the same kind
#   configs/nano/rows.sh asked       into runs/nano/rows/asked: questions on places and numbers
#   configs/nano/rows.sh related     into runs/nano/rows/related: how one thing lies to another in drawn scenes
#   configs/nano/rows.sh pairs       into runs/nano/rows/pairs: dialogues about two collages
#   configs/nano/rows.sh fresh       into runs/nano/rows/fresh: new scenes and collages, and pages that are mostly read aloud
#   configs/nano/rows.sh fresh_pairs into runs/nano/rows/fresh_pairs: new dialogues about two collages
#   configs/nano/rows.sh fresh_chat  into runs/nano/rows/fresh_chat: and about one
#   configs/nano/rows.sh letters     into runs/nano/rows/letters: which letters stand in each cell of a page
#   configs/nano/rows.sh pages       into runs/nano/rows/pages: new pages in English and Chinese, most of them read aloud
#   configs/nano/rows.sh signs       into runs/nano/rows/signs: which Chinese signs stand in each cell of others
#   configs/nano/rows.sh lines       into runs/nano/rows/lines: new drawn scenes, and pages to be read line by line
#   configs/nano/rows.sh close       into runs/nano/rows/close: new pages of the same kind, and animals to be named
#   configs/nano/rows.sh last        into runs/nano/rows/last: new pages once more, and animals and food to be named
#   configs/nano/rows.sh last_pairs  into runs/nano/rows/last_pairs: new dialogues about two collages
#   configs/nano/rows.sh related_more into runs/nano/rows/related_more: new ones of `related`
#   configs/nano/rows.sh whole       into runs/nano/rows/whole: new scenes, collages and pages of every kind
#   configs/nano/rows.sh counted     into runs/nano/rows/counted: questions on numbers, places and what there is
#   configs/nano/rows.sh whole_pairs into runs/nano/rows/whole_pairs: new dialogues about two collages
#   configs/nano/rows.sh boxed       into runs/nano/rows/boxed: new animals and food to be named, most with boxes
#   configs/nano/rows.sh level       into runs/nano/rows/level: new scenes, and twice as many collages and pages
#   configs/nano/rows.sh dialogue    into runs/nano/rows/dialogue: dialogues alone, for stage 3
#   configs/nano/rows.sh heldout     into runs/nano/rows/heldout, to compare stages on
#   configs/nano/rows.sh exam        into runs/nano/rows/exam: other collages, that no stage is chosen by
#
# It needs Debian's tuxpaint-stamps-default and fonts-liberation and the extra qwenvl-jax[generate].
set -e
# A task named twice is twice as likely.
scenes_tasks="vqa vqa vqa ref_grounding ref_grounding grounded_caption grounded_caption chat chat
  ocr_vqa caption grounded_captioning ocr"
collages_tasks="vqa vqa vqa ref_grounding ref_grounding grounded_caption grounded_caption compare
  compare chat chat caption grounded_captioning"
documents_tasks="ocr_vqa ocr_vqa vqa ocr chat"
named_tasks="grounded_caption grounded_caption grounded_caption grounded_caption
  grounded_captioning grounded_captioning ref_grounding ref_grounding vqa vqa vqa caption
  compare compare"
split=train skip=0
case $1 in
  train) scenes=80000 animals=50000 food=40000 english=24000 chinese=16000 ;;
  cells) scenes=0 animals=26000 food=22000 english=0 chinese=0 collages_tasks=cells ;;
  named) scenes=0 animals=90000 food=70000 english=0 chinese=0 collages_tasks=$named_tasks ;;
  more) scenes=0 animals=45000 food=35000 english=0 chinese=0 collages_tasks=$named_tasks skip=90000 ;;
  asked)
    scenes=30000 animals=14000 food=10000 english=0 chinese=0 skip=140000
    scenes_tasks="vqa chat" scenes_questions="relation relation exists where count"
    collages_tasks=vqa collages_questions="count count total more relation neighbour" ;;
  related)
    scenes=30000 animals=0 food=0 english=0 chinese=0 skip=360000
    scenes_tasks="vqa chat" scenes_questions="link link relation" ;;
  pairs)
    scenes=0 animals=25000 food=25000 english=0 chinese=0 skip=160000
    collages_tasks="compare either" ;;
  fresh)
    scenes=40000 animals=80000 food=60000 english=50000 chinese=0 skip=210000
    collages_tasks=$named_tasks documents_tasks="ocr_vqa vqa vqa ocr chat chat" ;;
  fresh_pairs)
    scenes=0 animals=20000 food=20000 english=0 chinese=0 skip=300000
    collages_tasks="compare either" ;;
  fresh_chat)
    scenes=0 animals=10000 food=10000 english=0 chinese=0 skip=330000 collages_tasks=chat ;;
  letters)
    scenes=0 animals=0 food=0 english=36000 chinese=0 skip=270000 documents_tasks=letters ;;
  pages)
    scenes=0 animals=0 food=0 english=20000 chinese=20000 skip=400000
    documents_tasks="ocr_vqa vqa vqa ocr chat chat" ;;
  signs)
    scenes=0 animals=0 food=0 english=0 chinese=34000 skip=460000 documents_tasks=letters ;;
  lines)
    scenes=50000 animals=0 food=0 english=30000 chinese=30000 skip=520000
    documents_tasks="ocr_vqa ocr_vqa ocr_vqa ocr ocr vqa chat" ;;
  close)
    scenes=0 animals=40000 food=0 english=30000 chinese=30000 skip=600000
    collages_tasks=$named_tasks
    documents_tasks="ocr_vqa ocr_vqa ocr_vqa ocr ocr ocr vqa chat" ;;
  last)
    scenes=0 animals=70000 food=16000 english=26000 chinese=26000 skip=700000
    collages_tasks=$named_tasks
    documents_tasks="ocr_vqa ocr_vqa ocr_vqa ocr ocr ocr vqa chat" ;;
  last_pairs)
    scenes=0 animals=12000 food=12000 english=0 chinese=0 skip=800000
    collages_tasks="compare either" ;;
  related_more)
    scenes=40000 animals=0 food=0 english=0 chinese=0 skip=900000
    scenes_tasks="vqa chat" scenes_questions="link relation relation" ;;
  whole)
    scenes=24000 animals=88000 food=36000 english=26000 chinese=26000 skip=1000000
    collages_tasks="$named_tasks grounded_caption vqa vqa chat chat"
    documents_tasks="ocr_vqa ocr_vqa ocr ocr ocr ocr vqa vqa chat" ;;
  counted)
    scenes=0 animals=50000 food=16000 english=0 chinese=0 skip=1150000
    collages_tasks=vqa collages_questions="total total count count exists exists more relation neighbour" ;;
  whole_pairs)
    scenes=0 animals=15000 food=10000 english=0 chinese=0 skip=1100000
    collages_tasks="compare either" ;;
  boxed)
    scenes=0 animals=64000 food=28000 english=0 chinese=0 skip=1300000
    collages_tasks="$named_tasks grounded_caption vqa vqa chat" ;;
  level)
    scenes=28000 animals=40000 food=16000 english=28000 chinese=28000 skip=1400000
    collages_tasks="$named_tasks grounded_caption vqa vqa chat"
    documents_tasks="ocr_vqa ocr_vqa ocr_vqa ocr ocr ocr vqa vqa chat chat" ;;
  dialogue)
    scenes=6000 animals=6000 food=5000 english=2500 chinese=2000
    scenes_tasks=chat collages_tasks="chat compare" documents_tasks=chat ;;
  heldout) split=heldout scenes=1000 animals=2000 food=2000 english=1000 chinese=1000 ;;
  exam) split=heldout scenes=0 animals=4000 food=4000 english=0 chinese=0 skip=2000 ;;
  *) echo "usage: configs/nano/rows.sh train|cells|named|more|asked|related|pairs|fresh|fresh_pairs|fresh_chat|letters|pages|signs|lines|close|last|last_pairs|related_more|whole|counted|whole_pairs|boxed|level|dialogue|heldout|exam" >&2; exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
rows=runs/nano/rows/$1

prepare() {
  "$python" -m qwenvl_jax.cli.main data prepare "$@" --rows-per-shard 2000 \
    --tokenizer configs/nano/wide.tiktoken --generated.split "$split"
}

stamps=/usr/share/tuxpaint/stamps
fonts=/usr/share/fonts/truetype/liberation  # without Chinese signs: for those the package's own

[ -d runs/nano/corpus ] || "$python" -m qwenvl_jax.data.sources.written_text runs/nano/corpus
# shellcheck disable=SC2086
[ $scenes = 0 ] || prepare scenes "$rows/scenes" --limit $scenes --skip $skip \
  --generated.tasks $scenes_tasks ${scenes_questions:+--generated.questions $scenes_questions}
for kind in animals food; do
  eval "limit=\$$kind"
  # shellcheck disable=SC2086
  [ "$limit" = 0 ] || prepare collages "$rows/$kind" --limit "$limit" --skip $skip --generated.tasks $collages_tasks \
    ${collages_questions:+--generated.questions $collages_questions} \
    --generated.side 112 --generated.most-kinds 2 --generated.objects "$stamps/$kind"
done
for language in english:en chinese:zh; do
  eval "limit=\$${language%:*}"
  # shellcheck disable=SC2086
  [ "$limit" = 0 ] || prepare documents "$rows/${language%:*}" --limit "$limit" --skip $skip \
    --generated.tasks $documents_tasks \
    --generated.languages "${language#*:}" --generated.corpus runs/nano/corpus \
    --generated.fonts "$fonts" --generated.page.short-side 112 112 --generated.page.aspect 1 1 \
    --generated.page.text-scale 0.22 0.34 --generated.page.max-lines 2
done
