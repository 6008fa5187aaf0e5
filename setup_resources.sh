#!/usr/bin/env bash
# Makes what NanoGrid needs in AWS, or takes it down again: `setup_resources.sh --help`.
#
# Each ensure_… function looks first and changes only what is missing or differs, so that a run
# that was stopped is finished by the next one. Only what has the tags that it gives is set right or
# removed. Every change goes through `change`, which a dry run swaps for one that prints. bash 3.2
# (macOS) reads this; it needs the AWS CLI, coreutils, and for --test-message zip or Python.
set -euo pipefail

# --------------------------------------------------------------------------- names and flags

REGION="${AWS_REGION:-${AWS_DEFAULT_REGION:-ap-northeast-2}}"
ENDPOINT="${AWS_ENDPOINT_URL:-}"
ACCOUNT=""
QUEUE="nanogrid-task-queue"
DLQ="" BUCKET="" ROLE="" INSTANCE_PROFILE=""  # named after the queue and the account
OUTPUT_BUCKET="" OUTPUT_QUEUE="" ALARM_TOPIC="" DASHBOARD=""
LEAST="" FORCE="" DRY_RUN="" ACTION="set_up"
NAMESPACE="NanoGrid/FunctionRunner"
CONFIG="application.yml"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

STEP="start"     # what is being done, for messages
FOUND=""         # what the last AWS command printed
OWNER=""         # the tags Project, Queue and Region of what was looked at last
MARK=""          # the bucket that a run was making, and may not have tagged yet
CHANGES=0
LEFT=0           # things that are not this script's to change
OUTPUT_URL="" TEMP=""
TAB=$'\t'
TAG_COLUMNS="[LIST[?Key=='Project']|[0].Value,LIST[?Key=='Queue']|[0].Value,LIST[?Key=='Region']|[0].Value]"
# The codes with which AWS says that something is not there. Nothing else means it: a 403 is no 404.
ABSENT='\((AWS\.SimpleQueueService\.NonExistentQueue|QueueDoesNotExist|NoSuchEntity|NoSuchBucket|NoSuchTagSet|ResourceNotFound|DashboardNotFoundError|NoSuchPublicAccessBlockConfiguration|OwnershipControlsNotFoundError|ServerSideEncryptionConfigurationNotFoundError)\)'
# What it says while it spreads word of something new, or works on it still.
NOT_YET="$ABSENT|Dead letter target does not exist|\((OperationAborted|ConcurrentModification)\)"

# The CLI v2 would otherwise open a pager, ask for what it thinks is missing, or hide an error's code.
export AWS_PAGER="" AWS_CLI_AUTO_PROMPT=off AWS_CLI_ERROR_FORMAT=legacy

usage() {
  cat <<END
usage: setup_resources.sh [flags]

Makes the queue with its dead-letter queue, the bucket, the role and the instance
profile that NanoGrid needs, then writes $CONFIG into the current directory.
What is there already is kept. A setting that differs is named, and set right where
this script made the thing (its tags say so) and the value is no larger or stricter.

  --region REGION          default: AWS_REGION, AWS_DEFAULT_REGION, else ap-northeast-2
  --account ID             go on only when the credentials (AWS_PROFILE) are of this account
  --endpoint URL           default: AWS_ENDPOINT_URL (an emulator)
  --queue NAME             default: $QUEUE
  --dlq NAME               default: the queue's name and -dlq
  --bucket NAME            default: nanogrid-code-bucket-ACCOUNTID
  --role NAME              default: NanoGridAgentRole; for another --queue, and -QUEUE
  --instance-profile NAME  default: NanoGridAgentProfile; likewise
  --output-bucket NAME     a bucket for results, in the role and in $CONFIG too
  --output-queue NAME      a queue for results, likewise
  --alarm-topic ARN        alarms to this SNS topic: dead letters, a message of 15 minutes
  --dashboard              a CloudWatch dashboard of queue, DLQ and functions
  --least                  the role without sqs:ChangeMessageVisibility
  --force                  also change (or remove) what this script did not make, and
                           write $CONFIG over one that is there
  --dry-run                print what would be done; change nothing
  --test-message           upload hello-python and send the message test-001
  --down                   remove what this script made for this queue, after a question;
                           a bucket that holds objects stays
  -h, --help               this text
END
}

parse_flags() {
  local variable
  while [ $# -gt 0 ]; do
    case "$1" in
      --region | --account | --endpoint | --queue | --dlq | --bucket | --role | --instance-profile | \
        --output-bucket | --output-queue | --alarm-topic)
        if [ $# -lt 2 ] || [ -z "$2" ]; then wrong_usage "$1 needs a value"; fi
        variable="$(printf '%s' "${1#--}" | tr a-z- A-Z_)"
        printf -v "$variable" '%s' "$2"
        shift
        ;;
      --dashboard) DASHBOARD=yes ;;
      --least) LEAST=yes ;;
      --force) FORCE=yes ;;
      --dry-run) DRY_RUN=yes ;;
      --test-message) choose send_test_message ;;
      --down) choose take_down ;;
      -h | --help) usage; exit 0 ;;
      *) wrong_usage "there is no flag $1" ;;
    esac
    shift
  done
}

choose() {
  [ "$ACTION" = set_up ] || wrong_usage "--down and --test-message do not go together"
  ACTION=$1
}

# Names go into JSON documents and ARNs as they are, so they are checked before anything is made.
# Each queue has a role and a profile of its own: a second one takes no permission from the first.
check_names() {
  local suffix="-$QUEUE" queue='^[A-Za-z0-9_-]{1,80}$' bucket='^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$'
  local of_queues="up to 80 letters, digits, _ and - (not FIFO)" of_buckets="3 to 63 small letters, digits, . and -"
  if [ "$QUEUE" = nanogrid-task-queue ]; then suffix=""; fi
  DLQ="${DLQ:-$QUEUE-dlq}"
  ROLE="${ROLE:-NanoGridAgentRole$suffix}"
  INSTANCE_PROFILE="${INSTANCE_PROFILE:-NanoGridAgentProfile$suffix}"
  POLICY="NanoGridAgentPolicy$suffix"
  check_name --region "$REGION" '^[a-z0-9-]{1,40}$' "small letters, digits and -"
  check_name --queue "$QUEUE" "$queue" "$of_queues"
  check_name --dlq "$DLQ" "$queue" "$of_queues"
  check_name --output-queue "$OUTPUT_QUEUE" "^$|$queue" "$of_queues"
  check_name --bucket "$BUCKET" "^$|$bucket" "$of_buckets"
  check_name --output-bucket "$OUTPUT_BUCKET" "^$|$bucket" "$of_buckets"
  check_name --role "$ROLE" '^[A-Za-z0-9+=,.@_-]{1,64}$' "up to 64 letters, digits and + = , . @ _ -"
  check_name --instance-profile "$INSTANCE_PROFILE" '^[A-Za-z0-9+=,.@_-]{1,128}$' \
    "up to 128 letters, digits and + = , . @ _ -"
  check_name --alarm-topic "$ALARM_TOPIC" '^$|^arn:aws[a-z-]*:sns:[A-Za-z0-9:_.-]+$' "the ARN of an SNS topic"
  [ "$QUEUE" != "$DLQ" ] || wrong_usage "--queue and --dlq are both $QUEUE: they are two queues"
  [[ "$OUTPUT_QUEUE" != "$QUEUE" && "$OUTPUT_QUEUE" != "$DLQ" ]] || wrong_usage "--output-queue is $OUTPUT_QUEUE as well"
}

check_name() {
  [[ "$2" =~ $3 ]] || wrong_usage "$1 is '$2'; it may be: $4"
}

# --------------------------------------------------------------------------- talking and failing

wrong_usage() {
  printf 'setup_resources.sh: %s; --help lists the flags\n' "$1" >&2
  exit 2
}

stop() {
  printf 'setup_resources.sh: %s: %s\n' "$STEP" "$1" >&2
  exit 1
}

# Ends the script after a command that failed: the step, the command, its answer, what to do.
refused() {
  local answer
  answer="$(cat "$TEMP/errors")"
  cat >&2 <<END
setup_resources.sh: failed at: $STEP
  command: $(as_typed "$@")
  answer:  ${answer#"${answer%%[![:space:]]*}"}
  to do:   $(remedy "$STEP: $answer")
  What was done before this step stays; run the script again to go on from here.
END
  exit 1
}

remedy() {
  case "$1" in
    "$CONFIG:"*)
      echo "run the script in a directory that you may write to, with room on its disk; a half-written $CONFIG has to go first." ;;
    *QueueDeletedRecently*)
      echo "SQS wants 60 seconds between a queue's end and a new one of its name: wait and run again." ;;
    "upload "*NoSuchBucket* | "message "*NonExistentQueue* | "message "*QueueDoesNotExist*)
      echo "it is not there: run setup_resources.sh without --test-message first, with the same names." ;;
    *BucketAlreadyExists* | "bucket "*AccessDenied* | "bucket "*"(403)"*)
      echo "if the name $BUCKET is another account's, take one of your own with --bucket NAME; if the bucket is yours, its permissions for the command above are missing." ;;
    *"Unable to locate credentials"* | *"config profile"* | *InvalidClientTokenId* | *ExpiredToken* | \
      *SignatureDoesNotMatch* | *UnrecognizedClient* | *InvalidAccessKeyId* | *AuthFailure* | *"SSO "* | *"Token has expired"*)
      echo "sign in (aws configure, aws sso login) or set AWS_PROFILE; credentials of China and GovCloud also need their own --region." ;;
    *AccessDenied* | *UnauthorizedOperation* | *"(403)"*)
      echo "give the caller the permission that the answer names, or set AWS_PROFILE to one that has it." ;;
    *DeleteConflict*)
      echo "something was added to it by hand: take that away (IAM console, or aws iam detach-role-policy) and run again." ;;
    *"Could not connect"* | *"imeout on endpoint"* | *"Invalid endpoint"* | *"Connection was closed"*)
      echo "is the network up, is there a region '$REGION', and is the endpoint (${ENDPOINT:-AWS itself}) right?" ;;
    *NoSuch* | *NonExistentQueue* | *QueueDoesNotExist* | *"letter target does not"* | *OperationAborted* | *ConcurrentMod* | \
      *Throttl* | *SlowDown* | *RequestLimitExceeded* | *ServiceUnavailable* | *InternalError*)
      echo "AWS was busy, or not all of it knows yet what was made or removed a moment ago: wait a minute and run again." ;;
    *)
      echo "the answer says what is wrong; aws --version shows whether the CLI is an old one." ;;
  esac
}

# A command on one line, quoted where a shell would need it.
as_typed() {
  local word text=""
  for word in "$@"; do
    if [[ "$word" == *[!A-Za-z0-9_./:=,@+-]* ]]; then word="'$word'"; fi
    text="$text $word"
  done
  printf '%s' "${text# }"
}

unchanged() { printf 'unchanged: %s\n' "$1"; }
differs() { printf 'differs: %s is %s, should be %s\n' "$STEP" "$1" "$2"; }

leave() {
  LEFT=$((LEFT + 1))
  printf 'left: %s\n' "$1"
}

# --------------------------------------------------------------------------- asking AWS

# --endpoint-url, since older CLIs do not know AWS_ENDPOINT_URL, and v1 passes over it for SQS.
aws() {
  command aws --region "$REGION" ${ENDPOINT:+--endpoint-url "$ENDPOINT"} --output text "$@"
}

# Runs a command that must succeed; FOUND is what it printed. In a set-up AWS has ten seconds to
# know everywhere what was made a moment ago.
ask() {
  local tries=11
  [ "$ACTION" = set_up ] || tries=1
  until FOUND="$("$@" 2>"$TEMP/errors")"; do
    tries=$((tries - 1))
    [[ "$tries" -gt 0 && "$(cat "$TEMP/errors")" =~ $NOT_YET ]] || refused "$@"
    sleep 1
  done
}

# Waits until AWS knows what was just made; a dry run made nothing.
await() { [ -n "$DRY_RUN" ] || ask "$@"; }

# Whether something is there; FOUND is what the command printed. Any error but "not there" ends it.
look() {
  if FOUND="$("$@" 2>"$TEMP/errors")"; then return 0; fi
  [[ "$(cat "$TEMP/errors")" =~ $ABSENT ]] || refused "$@"
  FOUND=""
  return 1
}

# change VERB WHAT COMMAND…: runs the command, says so, counts it. A dry run has the second one.
change() {
  local verb="$1" what="$2"
  shift 2
  ask "$@"
  CHANGES=$((CHANGES + 1))
  printf '%s: %s\n' "$verb" "$what"
}

only_print_changes() {
  change() {
    CHANGES=$((CHANGES + 1))
    printf 'would be %s: %s\n' "$1" "$2"
    shift 2
    FOUND=""
    if [ "$1" = aws ]; then printf '    %s\n' "$(as_typed "$@")"; fi
  }
}

# The JSON in FOUND without its white space.
compact() { printf '%s' "$FOUND" | tr -d ' \t\r\n'; }

# owned LIST COMMAND…: look, for OWNER in the LIST of tags; what is not there will be this script's.
owned() {
  OWNER="$MINE"
  look "${@:2}" --query "${TAG_COLUMNS//LIST/$1}" || return 1
  OWNER="$FOUND"
}

# Whether this script made it for this queue, or is told to act as if it had; says so when not.
may_change() {
  if [ "$OWNER" = "$MINE" ] || [ -n "$FORCE" ]; then return; fi
  leave "$STEP: this script did not make it so for this queue; --force goes on all the same"
  return 1
}

# setting NAME NOW VALUE COMMAND…: sets it by the command, unless NOW is no less than VALUE.
setting() {
  local STEP="$STEP: $1"
  if [ "$2" = "$3" ]; then
    unchanged "$STEP"
  elif serves "$2" "$3"; then
    printf 'kept: %s is %s, no less than %s\n' "$STEP" "$2" "$3"
  else
    if [ "$2" != None ]; then differs "$2" "$3"; fi
    if may_change; then change set "$STEP" "${@:4}"; fi
  fi
}

# Whether NOW is somebody's choice that does what VALUE does: a larger number, the same DLQ after no
# fewer receives, encryption by KMS, EC2 among those who are trusted, VALUE's statements and then more.
serves() {
  local receives='maxReceiveCount:([0-9]+)'
  if [[ "$1" =~ ^[0-9]+$ && "$2" =~ ^[0-9]+$ ]]; then
    [ "$1" -ge "$2" ]
  elif [[ ",$1," == *",deadLetterTargetArn:$DLQ_ARN,"* && "$1" =~ $receives ]]; then
    [ "${BASH_REMATCH[1]}" -ge "${2##*:}" ]
  else
    [[ "$2 $1" == "AES256 aws:kms"* || " $1 " == *" $2 "* || "$1" == "${2%??}",* ||
      "$2" == *sts:AssumeRole* && "$1" == *"\"ec2.$DOMAIN\""* ]]
  fi
}

remove() {
  if may_change; then change removed "$STEP" "$@"; fi
}

# --------------------------------------------------------------------------- who and where

prepare() {
  type -P aws >/dev/null || stop "the AWS CLI (aws) is not on PATH: install it, then run this again"
  TEMP="$(mktemp -d "${TMPDIR:-/tmp}/nanogrid.XXXXXX")" || stop "no temporary directory can be made: set TMPDIR to one that you may write to"
  trap 'rm -rf "$TEMP"' EXIT
  if [ -n "$DRY_RUN" ]; then only_print_changes; fi
}

# Account and partition (aws, aws-cn, aws-us-gov) are read from the caller's own ARN.
identify() {
  local arn wanted="$ACCOUNT"
  STEP="credentials"
  ask aws sts get-caller-identity --query "[Account,Arn]"
  [[ "$FOUND" =~ ^([0-9]{12})"$TAB"(arn:(aws[a-z-]*):.*)$ ]] || stop "sts get-caller-identity answered '$FOUND', which is no account id and ARN"
  ACCOUNT="${BASH_REMATCH[1]}"
  arn="${BASH_REMATCH[2]}"
  PARTITION="${BASH_REMATCH[3]}"
  [ "${wanted:-$ACCOUNT}" = "$ACCOUNT" ] || stop "these are credentials of account $ACCOUNT, not $wanted: set AWS_PROFILE to the right profile"
  DOMAIN=amazonaws.com  # of services, and of EC2 as a principal
  if [ "$PARTITION" = aws-cn ]; then DOMAIN=amazonaws.com.cn; fi
  BUCKET="${BUCKET:-nanogrid-code-bucket-$ACCOUNT}"
  QUEUE_ARN="arn:$PARTITION:sqs:$REGION:$ACCOUNT:$QUEUE"
  DLQ_ARN="arn:$PARTITION:sqs:$REGION:$ACCOUNT:$DLQ"
  TAGS=("Key=Project,Value=nanogrid" "Key=Queue,Value=$QUEUE" "Key=Region,Value=$REGION")
  MINE="nanogrid$TAB$QUEUE$TAB$REGION"
  printf 'account %s, region %s, as %s\n' "$ACCOUNT" "$REGION" "$arn"
}

# --------------------------------------------------------------------------- queues

# Whether the queue is there; QUEUE_URL is its URL afterwards, there or not.
find_queue() {
  local there=yes
  STEP="queue $1"
  look aws sqs get-queue-url --queue-name "$1" --query QueueUrl || there=""
  QUEUE_URL="$(queue_url "$1")"
  [ -n "$there" ]
}

# The tags of the queue at QUEUE_URL: OWNER, and MARK.
look_at_queue_tags() {
  ask aws sqs list-queue-tags --queue-url "$QUEUE_URL" --query "Tags.[Project,Queue,Region,MakesBucket]"
  OWNER="${FOUND%"$TAB"*}"
  MARK="${FOUND##*"$TAB"}"
}

# ensure_queue NAME ATTRIBUTE=VALUE…; QUEUE_URL is its URL afterwards.
ensure_queue() {
  local name="$1" pair names="" json="" columns
  shift
  for pair in "$@"; do
    names="$names,${pair%%=*}"
    json="$json$(member "$pair")"
  done
  if ! find_queue "$name"; then
    change made "$STEP" aws sqs create-queue --queue-name "$name" --attributes "{${json#,}}" \
      --tags "Project=nanogrid,Queue=$QUEUE,Region=$REGION" --query QueueUrl
    QUEUE_URL="$(queue_url "$name")"
    await sleep 1  # SQS asks for it before a new queue is used
    return
  fi
  look_at_queue_tags
  ask aws sqs get-queue-attributes --queue-url "$QUEUE_URL" --attribute-names All \
    --query "Attributes.[${names#,}]"
  columns="$FOUND"
  for pair in "$@"; do
    json="$(member "$pair")"
    setting "${pair%%=*}" "$(plain "${columns%%"$TAB"*}")" "$(plain "${pair#*=}")" \
      aws sqs set-queue-attributes --queue-url "$QUEUE_URL" --attributes "{${json#,}}"
    columns="${columns#*"$TAB"}"
  done
}

# The URL as the console shows it: the CLI v1 asks at an older address and is answered with that.
# An emulator's is in FOUND.
queue_url() {
  local url="${ENDPOINT:+$FOUND}"
  printf '%s' "${url:-https://sqs.$REGION.$DOMAIN/$ACCOUNT/$1}"
}

# ATTRIBUTE=VALUE as a member of the JSON object that the CLI takes; quotes in it are escaped already.
member() { printf ',"%s":"%s"' "${1%%=*}" "${1#*=}"; }

# An attribute without what may differ in how its JSON is written: quotes, escapes, spaces, braces.
plain() { printf '%s' "$1" | tr -d ' "\\{}'; }

# The DLQ keeps messages as long as its source does: a message's age counts from its first queue.
ensure_queues() {
  if [ -n "$OUTPUT_QUEUE" ]; then
    ensure_queue "$OUTPUT_QUEUE" MessageRetentionPeriod=1209600
    OUTPUT_URL="$QUEUE_URL"
  fi
  ensure_queue "$DLQ" MessageRetentionPeriod=1209600
  ensure_queue "$QUEUE" VisibilityTimeout=300 MessageRetentionPeriod=1209600 \
    ReceiveMessageWaitTimeSeconds=20 MaximumMessageSize=262144 \
    "RedrivePolicy={\\\"deadLetterTargetArn\\\":\\\"$DLQ_ARN\\\",\\\"maxReceiveCount\\\":3}"
}

# --------------------------------------------------------------------------- bucket

# A bucket has no tags in the moment in which it is made: until it has, a mark on the queue says so.
# us-east-1 is the one region that S3 does not take as a LocationConstraint.
ensure_bucket() {
  local where="--create-bucket-configuration=LocationConstraint=$REGION"
  if [ "$REGION" = us-east-1 ]; then where=""; fi
  STEP="bucket $1"
  if look aws s3api get-bucket-location --bucket "$1" --expected-bucket-owner "$ACCOUNT" \
    --query LocationConstraint; then
    FOUND="${FOUND/#None/us-east-1}"  # so S3 spells two regions
    [ "${FOUND/#EU/eu-west-1}" = "$REGION" ] || stop "it is in $FOUND, not in $REGION, and no bucket can be moved: take another name for it, or --region $FOUND"
  else
    [ "$MARK" = "$1" ] || change marked "queue $QUEUE" aws sqs tag-queue --queue-url "$QUEUE_URL" --tags "MakesBucket=$1"
    change made "$STEP" aws s3api create-bucket --bucket "$1" ${where:+"$where"}
    await aws s3api wait bucket-exists --bucket "$1"
    MARK="$1"
  fi
  owned TagSet aws s3api get-bucket-tagging --bucket "$1" || OWNER=""
  if [ "$MARK" = "$1" ]; then
    [ "$OWNER" = "$MINE" ] || change tagged "$STEP" aws s3api put-bucket-tagging --bucket "$1" \
      --tagging "TagSet=[{${TAGS[0]}},{${TAGS[1]}},{${TAGS[2]}}]"
    change unmarked "queue $QUEUE" aws sqs untag-queue --queue-url "$QUEUE_URL" --tag-keys MakesBucket
    OWNER="$MINE"
  fi
  ensure_bucket_settings "$1"
}

ensure_bucket_settings() {
  bucket_setting "$1" "public access block" "True True True True" get-public-access-block \
    "PublicAccessBlockConfiguration.[BlockPublicAcls,IgnorePublicAcls,BlockPublicPolicy,RestrictPublicBuckets]" \
    put-public-access-block --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
  # BucketOwnerEnforced is what the console calls "ACLs disabled".
  bucket_setting "$1" "object ownership" BucketOwnerEnforced get-bucket-ownership-controls \
    "OwnershipControls.Rules[0].ObjectOwnership" \
    put-bucket-ownership-controls --ownership-controls "Rules=[{ObjectOwnership=BucketOwnerEnforced}]"
  bucket_setting "$1" encryption AES256 get-bucket-encryption \
    "ServerSideEncryptionConfiguration.Rules[0].ApplyServerSideEncryptionByDefault.SSEAlgorithm" \
    put-bucket-encryption --server-side-encryption-configuration \
    '{"Rules":[{"ApplyServerSideEncryptionByDefault":{"SSEAlgorithm":"AES256"}}]}'
}

# bucket_setting BUCKET NAME VALUE GET-COMMAND QUERY PUT-COMMAND OPTION…
bucket_setting() {
  look aws s3api "$4" --bucket "$1" --query "$5" || FOUND=None
  setting "$2" "${FOUND//$TAB/ }" "$3" aws s3api "$6" --bucket "$1" "${@:7}"
}

# --------------------------------------------------------------------------- role

# The tasks are sent by others: sqs:SendMessage is for results only. The conditions matter when a
# bucket has gone: its name is then anybody's, and whoever serves the zip runs code.
role_policy() {
  local extend=', "sqs:ChangeMessageVisibility"' allow='"Effect": "Allow", "Action"'
  local here='"Condition": {"StringEquals": {"aws:ResourceAccount": "'$ACCOUNT'"}}'
  if [ -n "$LEAST" ]; then extend=""; fi
  cat <<END
{"Version": "2012-10-17", "Statement": [
  {"Sid": "SQSAccess", $allow: ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"$extend],
   "Resource": "$QUEUE_ARN"},
  {"Sid": "S3Access", $allow: ["s3:GetObject", "s3:ListBucket"],
   "Resource": ["arn:$PARTITION:s3:::$BUCKET", "arn:$PARTITION:s3:::$BUCKET/*"], $here},
  {"Sid": "CloudWatchAccess", $allow: ["cloudwatch:PutMetricData"], "Resource": "*",
   "Condition": {"StringEquals": {"cloudwatch:namespace": "$NAMESPACE"}}}
END
  if [ -n "$OUTPUT_BUCKET" ]; then
    printf ', {"Sid": "OutputBucket", %s: ["s3:PutObject"], "Resource": "%s/*", %s}' \
      "$allow" "arn:$PARTITION:s3:::$OUTPUT_BUCKET" "$here"
  fi
  if [ -n "$OUTPUT_QUEUE" ]; then
    printf ', {"Sid": "OutputQueue", %s: ["sqs:SendMessage"], "Resource": "%s"}' \
      "$allow" "${QUEUE_ARN%:*}:$OUTPUT_QUEUE"
  fi
  printf ']}'
}

ensure_role() {
  local trust='{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"Service":"ec2.'
  trust="$trust$DOMAIN\"},\"Action\":\"sts:AssumeRole\"}]}"
  STEP="role $ROLE"
  if ! owned Role.Tags aws iam get-role --role-name "$ROLE"; then
    change made "$STEP" aws iam create-role --role-name "$ROLE" --assume-role-policy-document "$trust" \
      --tags "${TAGS[@]}"
    await aws iam wait role-exists --role-name "$ROLE"
    return
  fi
  ask aws iam get-role --role-name "$ROLE" --query Role.AssumeRolePolicyDocument --output json
  setting "trust policy" "$(compact)" "$trust" \
    aws iam update-assume-role-policy --role-name "$ROLE" --policy-document "$trust"
}

# A role of another queue gets one policy more. One that has other statements than this script's is
# some agents': another bucket's or region's, or somebody has added to it.
ensure_role_policy() {
  local wanted now=None extend=',"sqs:ChangeMessageVisibility"'
  FOUND="$(role_policy)"
  wanted="$(compact)"
  STEP="role policy $POLICY"
  if [[ "$OWNER" == "nanogrid$TAB"* ]]; then OWNER="$MINE"; fi
  if look aws iam get-role-policy --role-name "$ROLE" --policy-name "$POLICY" \
    --query PolicyDocument --output json; then
    now="$(compact)"
    FOUND="${now/$extend/}"
    if [[ "${wanted/$extend/}" != "${FOUND%??}"* ]]; then OWNER=""; fi
  fi
  setting document "$now" "$wanted" aws iam put-role-policy --role-name "$ROLE" \
    --policy-name "$POLICY" --policy-document "$wanted"
}

# Whether the profile is there; FOUND is the role in it, or None.
find_profile() {
  STEP="instance profile $INSTANCE_PROFILE"
  owned InstanceProfile.Tags aws iam get-instance-profile --instance-profile-name "$INSTANCE_PROFILE" || return 1
  ask aws iam get-instance-profile --instance-profile-name "$INSTANCE_PROFILE" \
    --query "InstanceProfile.Roles[0].RoleName"
}

# A profile holds one role at most. Another one that is in it is what some instances work with.
ensure_instance_profile() {
  local now=None
  if find_profile; then
    now="$FOUND"
  else
    change made "$STEP" aws iam create-instance-profile --instance-profile-name "$INSTANCE_PROFILE" \
      --tags "${TAGS[@]}"
    await aws iam wait instance-profile-exists --instance-profile-name "$INSTANCE_PROFILE"
  fi
  if [ "$now" != None ] && [ "$now" != "$ROLE" ]; then
    OWNER=""
    if [ -n "$FORCE" ]; then empty_profile; fi
  fi
  setting role "$now" "$ROLE" aws iam add-role-to-instance-profile \
    --instance-profile-name "$INSTANCE_PROFILE" --role-name "$ROLE"
}

empty_profile() {
  if [ "$FOUND" != None ]; then
    change removed "$STEP: role $FOUND" aws iam remove-role-from-instance-profile \
      --instance-profile-name "$INSTANCE_PROFILE" --role-name "$FOUND"
  fi
}

# --------------------------------------------------------------------------- alarms, dashboard

# ensure_alarm NAME QUEUE METRIC THRESHOLD
ensure_alarm() {
  local now=None
  if find_alarm "$1"; then
    ask aws cloudwatch describe-alarms --alarm-names "${STEP#alarm }" --query "MetricAlarms[0].AlarmActions"
    now="${FOUND//$TAB/ }"
  fi
  setting topic "$now" "$ALARM_TOPIC" aws cloudwatch put-metric-alarm --alarm-name "${STEP#alarm }" \
    --namespace AWS/SQS --metric-name "$3" --dimensions "Name=QueueName,Value=$2" --statistic Maximum \
    --period 60 --evaluation-periods 1 --threshold "$4" --comparison-operator GreaterThanThreshold \
    --treat-missing-data notBreaching --alarm-actions "$ALARM_TOPIC" --tags "${TAGS[@]}"
}

find_alarm() {
  STEP="alarm NanoGrid-$QUEUE-$1"
  OWNER="$MINE"
  ask aws cloudwatch describe-alarms --alarm-names "${STEP#alarm }" --query "MetricAlarms[].AlarmArn"
  [ -n "$FOUND" ] && owned Tags aws cloudwatch list-tags-for-resource --resource-arn "$FOUND"
}

dashboard() {
  local panel='{"type": "metric", "width": 12, "properties": {"period": 60, "region": "'$REGION'"'
  cat <<END
{"widgets": [
$panel, "stat": "Maximum", "title": "Messages that wait", "metrics": [["AWS/SQS", "ApproximateNumberOfMessagesVisible", "QueueName", "$QUEUE"]]}},
$panel, "stat": "Maximum", "title": "Oldest message, in seconds", "metrics": [["AWS/SQS", "ApproximateAgeOfOldestMessage", "QueueName", "$QUEUE"]]}},
$panel, "stat": "Maximum", "title": "Messages in the DLQ", "metrics": [["AWS/SQS", "ApproximateNumberOfMessagesVisible", "QueueName", "$DLQ"]]}},
$panel, "title": "Peak memory of each function", "metrics": [[{"expression": "SEARCH('{$NAMESPACE,FunctionId,Runtime} MetricName=\"PeakMemoryBytes\"', 'Maximum', 60)"}]]}}
]}
END
}

# Not every CLI can tag a dashboard: one that nobody has edited is this script's.
find_dashboard() {
  STEP="dashboard NanoGrid-$QUEUE-$REGION"
  OWNER="$MINE"
  look aws cloudwatch get-dashboard --dashboard-name "${STEP#dashboard }" --query DashboardBody || return 1
  if [ "$FOUND" != "$(dashboard)" ]; then OWNER=""; fi
}

ensure_dashboard() {
  find_dashboard || FOUND=None
  setting body "$FOUND" "$(dashboard)" aws cloudwatch put-dashboard \
    --dashboard-name "${STEP#dashboard }" --dashboard-body "$(dashboard)"
}

# --------------------------------------------------------------------------- application.yml

# The example with this set's own values, less the hints for whoever fills it in by hand.
render_config() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in
      *"# ↑ "* | "    # e.g. "*) ;;
      "    region: "*) printf '    region: %s\n' "$REGION" ;;
      "    endpointUrl:"*) printf '    endpointUrl:%s\n' "${ENDPOINT:+ $ENDPOINT}" ;;
      "    queueUrl: "*YOUR_ACCOUNT_ID*) printf '    queueUrl: %s\n' "$QUEUE_URL" ;;
      "    codeBucket: "*) printf '    codeBucket: %s\n' "$BUCKET" ;;
      "    bucket:") printf '    bucket:%s\n' "${OUTPUT_BUCKET:+ $OUTPUT_BUCKET}" ;;
      "    queueUrl:") printf '    queueUrl:%s\n' "${OUTPUT_URL:+ $OUTPUT_URL}" ;;
      *) printf '%s\n' "$line" ;;
    esac
  done <"$HERE/$CONFIG.example"
}

write_config() { printf '%s\n' "$WANTED_CONFIG" >"$CONFIG"; }

ensure_config() {
  local now=""
  STEP="$CONFIG"
  WANTED_CONFIG="$(render_config)"
  if [ -e "$CONFIG" ]; then now="$(cat "$CONFIG")"; fi
  if [ "$now" = "$WANTED_CONFIG" ]; then
    unchanged "$STEP"
  elif ! [ -e "$CONFIG" ] || [ -n "$FORCE" ] || [ "$now" = "$(OUTPUT_BUCKET="" OUTPUT_URL="" render_config)" ]; then
    change written "$STEP" write_config
  elif [[ "$now" == *"$QUEUE_URL"*"$BUCKET"*"$OUTPUT_BUCKET"*"$OUTPUT_URL"* ]]; then
    unchanged "$STEP (edited since it was written; --force writes it anew)"
  else
    leave "$STEP is there and does not name this queue and bucket: put them in ($QUEUE_URL, $BUCKET${OUTPUT_BUCKET:+, $OUTPUT_BUCKET}${OUTPUT_URL:+, $OUTPUT_URL}), or let --force write it anew"
  fi
}

# --------------------------------------------------------------------------- what the flags ask for

set_up() {
  STEP="$CONFIG.example"
  [ -r "$HERE/$STEP" ] || stop "it is not beside setup_resources.sh ($HERE): fetch it, $CONFIG is written from it"
  ensure_queues
  ensure_bucket "$BUCKET"
  if [ -n "$OUTPUT_BUCKET" ]; then ensure_bucket "$OUTPUT_BUCKET"; fi
  ensure_role
  ensure_role_policy
  ensure_instance_profile
  if [ -n "$ALARM_TOPIC" ]; then
    ensure_alarm dead-letters "$DLQ" ApproximateNumberOfMessagesVisible 0
    # What fails is in the DLQ after three receives of 300 s: an older message waits for an agent.
    ensure_alarm oldest-message "$QUEUE" ApproximateAgeOfOldestMessage 900
  fi
  if [ -n "$DASHBOARD" ]; then ensure_dashboard; fi
  ensure_config
  summary "everything is as it should be"
}

summary() {
  local left=""
  if [ "$LEFT" -gt 0 ]; then left="; left as they are, for the reasons above: $LEFT"; fi
  if [ "$CHANGES" -eq 0 ]; then
    printf 'Nothing changed%s.\n' "${left:-: $1}"
  elif [ -n "$DRY_RUN" ]; then
    printf 'Dry run: nothing was changed; changes that would be made: %s%s.\n' "$CHANGES" "$left"
  else
    printf 'Done; changes: %s%s.\n' "$CHANGES" "$left"
  fi
}

send_test_message() {
  local key="functions/hello-python/v1.zip"
  find_queue "$QUEUE" || stop "it is not there: run setup_resources.sh without --test-message first, with the same names"
  make_test_zip
  STEP="upload to bucket $BUCKET"
  change uploaded "s3://$BUCKET/$key" aws s3 cp --only-show-errors "$TEMP/hello-python.zip" "s3://$BUCKET/$key"
  cat >"$TEMP/test-message.json" <<END
{"requestId": "test-001", "functionId": "hello-python", "runtime": "python",
 "s3Bucket": "$BUCKET", "s3Key": "$key", "timeoutMs": 5000, "memoryMb": 256}
END
  STEP="message to queue $QUEUE"
  change sent "test-001 to $QUEUE_URL" aws sqs send-message --queue-url "$QUEUE_URL" \
    --message-body "file://$TEMP/test-message.json" --query MessageId
  if [ -n "$DRY_RUN" ]; then return; fi
  cat <<'END'
Look for these in the agent's log (python nanogrid.py --config application.yml):
  INFO [test-001] stdout: Hello from NanoGrid!
  INFO REPORT requestId=test-001 functionId=hello-python runtime=python status=ok …
  Successfully published 1 values …
END
}

# No subshells here: bash 3.2 goes on after one that failed.
make_test_zip() {
  local python
  STEP="zip of hello-python"
  cat >"$TEMP/main.py" <<'END'
#!/usr/bin/env python3
print("Hello from NanoGrid!")
print("Result: 42")
END
  if type -P zip >/dev/null; then
    ask zip -q -j "$TEMP/hello-python.zip" "$TEMP/main.py"
    return
  fi
  python="$(type -P python3 || type -P python)" || stop "neither zip nor Python is on PATH: install one of them"
  ask "$python" -m zipfile -c "$TEMP/hello-python.zip" "$TEMP/main.py"
}

# --------------------------------------------------------------------------- taking it down

# In the reverse order of making; the agent loses its rights before its queue goes. The main queue
# goes last: it has the mark of a bucket that was half made, and application.yml is known by its URL.
take_down() {
  agree
  remove_instance_profile
  remove_role
  remove_alarms_and_dashboard
  if find_queue "$QUEUE"; then look_at_queue_tags; fi
  remove_bucket "$BUCKET"
  if [ -n "$OUTPUT_BUCKET" ]; then remove_bucket "$OUTPUT_BUCKET"; fi
  if [ -n "$OUTPUT_QUEUE" ]; then
    remove_queue "$OUTPUT_QUEUE"
    OUTPUT_URL="$QUEUE_URL"
  fi
  remove_queue "$DLQ"
  remove_queue "$QUEUE"
  remove_config
  summary "none of it was there"
}

agree() {
  local answer=""
  say_what_would_be_lost
  STEP="--down"
  if [ -n "$DRY_RUN" ]; then return; fi
  printf 'Type yes to go on: '
  read -r answer || true
  if ! [ -t 0 ]; then printf '\n'; fi
  [ "$answer" = yes ] || stop "the answer was not yes: nothing was removed"
}

say_what_would_be_lost() {
  local name count=ApproximateNumberOfMessages
  printf 'This removes what the script made for queue %s, and all messages:\n' "$QUEUE"
  for name in "$QUEUE" "$DLQ" "$OUTPUT_QUEUE"; do
    if [ -n "$name" ] && find_queue "$name"; then
      ask aws sqs get-queue-attributes --queue-url "$QUEUE_URL" --attribute-names All \
        --query "Attributes.[$count,${count}NotVisible,${count}Delayed]"
      printf '  queue %s; messages that wait, are in work, are delayed: %s\n' "$name" "${FOUND//$TAB/, }"
    fi
  done
  FOUND="$(aws ec2 describe-iam-instance-profile-associations --query \
    "IamInstanceProfileAssociations[?ends_with(IamInstanceProfile.Arn, '/$INSTANCE_PROFILE')].InstanceId" \
    2>"$TEMP/errors")" || FOUND="not known: $(cat "$TEMP/errors")"
  printf '  instance profile %s; instances that use it: %s\n' "$INSTANCE_PROFILE" "${FOUND:-none}"
  printf '  role %s, alarms, dashboard; bucket %s if it is empty\n' "$ROLE" "$BUCKET${OUTPUT_BUCKET:+, $OUTPUT_BUCKET}"
}

# Whether it is there, by such a command; says so when not.
there() {
  if "$@"; then return; fi
  printf 'not there: %s\n' "$STEP"
  return 1
}

remove_instance_profile() {
  there find_profile || return 0
  may_change || return 0
  empty_profile
  change removed "$STEP" aws iam delete-instance-profile --instance-profile-name "$INSTANCE_PROFILE"
}

# A role of another queue stays, less what this queue has in it.
remove_role() {
  STEP="role $ROLE"
  there owned Role.Tags aws iam get-role --role-name "$ROLE" || return 0
  if [[ "$OWNER" == "nanogrid$TAB"* || -n "$FORCE" ]] &&
    look aws iam get-role-policy --role-name "$ROLE" --policy-name "$POLICY" --query PolicyName; then
    change removed "$STEP: policy $POLICY" aws iam delete-role-policy --role-name "$ROLE" \
      --policy-name "$POLICY"
  fi
  remove aws iam delete-role --role-name "$ROLE"
}

remove_alarms_and_dashboard() {
  local name
  for name in dead-letters oldest-message; do
    if find_alarm "$name"; then remove aws cloudwatch delete-alarms --alarm-names "${STEP#alarm }"; fi
  done
  if find_dashboard; then remove aws cloudwatch delete-dashboards --dashboard-names "${STEP#dashboard }"; fi
}

remove_queue() {
  there find_queue "$1" || return 0
  look_at_queue_tags
  remove aws sqs delete-queue --queue-url "$QUEUE_URL"
}

# Old versions and delete markers are objects too: S3 deletes no bucket that holds any.
remove_bucket() {
  STEP="bucket $1"
  there look aws s3api list-object-versions --bucket "$1" --no-paginate --max-keys 1 \
    --expected-bucket-owner "$ACCOUNT" --query "[Versions[0].Key,DeleteMarkers[0].Key]" || return 0
  if [ "$FOUND" != "None${TAB}None" ]; then
    FOUND="${FOUND#None"$TAB"}"  # one key, or two
    leave "$STEP holds objects (such as ${FOUND%%"$TAB"*}): keep it, or empty it (aws s3 rm s3://$1 --recursive; old versions: in the console) and run --down again"
  else
    owned TagSet aws s3api get-bucket-tagging --bucket "$1" || OWNER=""
    if [ "$MARK" = "$1" ]; then OWNER="$MINE"; fi
    remove aws s3api delete-bucket --bucket "$1"
  fi
}

# Only a file that nobody has edited is ours to remove.
remove_config() {
  STEP="$CONFIG"
  there test -e "$CONFIG" || return 0
  if [ -r "$HERE/$CONFIG.example" ] && [ "$(cat "$CONFIG")" = "$(render_config)" ]; then
    change removed "$STEP" rm "$CONFIG"
  else
    leave "$STEP is not as this script writes it: remove it yourself, or keep it"
  fi
}

# ---------------------------------------------------------------------------

main() {
  parse_flags "$@"
  check_names
  prepare
  identify
  "$ACTION"
}

main "$@"
