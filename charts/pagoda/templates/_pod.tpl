{{/* Parts of a server's pod. Each takes the root context; the Deployment puts them together. */}}

{{- define "pagoda.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: {{ int64 .Values.security.fsGroup }}
fsGroup: {{ int64 .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "pagoda.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "pagoda.environment" -}}
# For `kubectl exec … pagoda probe` and `pagoda doctor`, which then see what the server sees.
- name: PAGODA_CONFIG
  value: /etc/pagoda/pagoda.json
{{- with .Values.security.apiKeysSecret }}
{{- if .name }}
- name: PAGODA_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- with .Values.model.hubTokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "pagoda.resources" -}}
{{- $limits := deepCopy .Values.resources.limits -}}
{{- if .Values.resources.gpus -}}
{{- $_ := set $limits .Values.resources.gpuResource (int .Values.resources.gpus) -}}
{{- end -}}
{{- dict "requests" .Values.resources.requests "limits" $limits | toYaml -}}
{{- end -}}

{{/* The kubelet asks the server itself: no process is started in the pod, and the answers are the engine's state. */}}
{{- define "pagoda.probes" -}}
startupProbe:
  httpGet: {{- include "pagoda.probeTarget" (list . "/v2/health/ready") | nindent 4 }}
  periodSeconds: {{ int .Values.probes.startup.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.startup.timeoutSeconds }}
  failureThreshold: {{ include "pagoda.startupFailureThreshold" . }}
readinessProbe:
  httpGet: {{- include "pagoda.probeTarget" (list . "/v2/health/ready") | nindent 4 }}
  periodSeconds: {{ int .Values.probes.readiness.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.readiness.timeoutSeconds }}
  failureThreshold: {{ int .Values.probes.readiness.failureThreshold }}
livenessProbe:
  httpGet: {{- include "pagoda.probeTarget" (list . "/v2/health/live") | nindent 4 }}
  periodSeconds: {{ int .Values.probes.liveness.periodSeconds }}
  timeoutSeconds: {{ int .Values.probes.liveness.timeoutSeconds }}
  failureThreshold: {{ int .Values.probes.liveness.failureThreshold }}
{{- end -}}

{{- define "pagoda.probeTarget" -}}
path: {{ index . 1 }}
port: http1
scheme: {{ include "pagoda.scheme" (index . 0) | upper }}
{{- end -}}

{{- define "pagoda.volumeMounts" -}}
- name: config
  mountPath: /etc/pagoda
  readOnly: true
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if eq (include "pagoda.modelSource" .) "claim" }}
- name: model
  mountPath: /models
  readOnly: true
  {{- with .Values.model.claim.path }}
  subPath: {{ . }}
  {{- end }}
{{- else if eq (include "pagoda.modelSource" .) "initContainer" }}
- name: model
  mountPath: /models
  readOnly: true
{{- end }}
{{- if .Values.network.tls.secretName }}
- name: tls
  mountPath: /etc/pagoda-tls
  readOnly: true
{{- end }}
{{- with .Values.storage.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "pagoda.volumes" -}}
- name: config
  configMap:
    name: {{ include "pagoda.fullname" . }}
- name: cache
  {{- if .Values.storage.cache.claimName }}
  persistentVolumeClaim:
    claimName: {{ .Values.storage.cache.claimName }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.storage.cache.sizeLimit }}
  {{- end }}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.resources.sharedMemory }}
{{- if eq (include "pagoda.modelSource" .) "claim" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.claim.name }}
    readOnly: true
{{- else if eq (include "pagoda.modelSource" .) "initContainer" }}
- name: model
  emptyDir:
    sizeLimit: {{ .Values.model.initContainer.sizeLimit }}
{{- end }}
{{- with .Values.network.tls.secretName }}
- name: tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- with .Values.storage.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "pagoda.initContainers" -}}
{{- with .Values.model.initContainer -}}
- name: model
  image: {{ .image }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  {{- with .command }}
  command: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .args }}
  args: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "pagoda.containerSecurityContext" $ | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: /models
    - name: tmp
      mountPath: /tmp
{{- end -}}
{{- end -}}

{{- define "pagoda.placement" -}}
{{- with .Values.placement.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.placement.tolerations .Values.resources.gpus }}
tolerations:
  {{- if .Values.resources.gpus }}
  - key: {{ .Values.resources.gpuResource }}
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with .Values.placement.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
affinity:
  {{- if .Values.placement.affinity }}
  {{- toYaml .Values.placement.affinity | nindent 2 }}
  {{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{- include "pagoda.selectorLabels" . | nindent 14 }}
  {{- end }}
{{- with .Values.placement.spreadOver }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "pagoda.selectorLabels" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- with .Values.placement.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.placement.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}
